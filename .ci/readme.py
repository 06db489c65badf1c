"""Make README.md from nbs/index.ipynb: `python .ci/readme.py`, or `--check` to see whether they agree."""
import json
import re
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def from_root(match):
    "A link as it is seen from the repository's root: the index lies in nbs/."
    before, target, after = match.groups()
    return f'{before}nbs/{target}{after}' if (root/'nbs'/target).exists() else match[0]


def readme():
    "The markdown cells of the index, with the cells of code that are shown there."
    blocks = []
    for cell in json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': blocks.append(re.sub(r'(\]\()([^)#:]+)(\))', from_root, source))
        elif not source.startswith('#|'): blocks.append(f'```python\n{source}\n```')
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n\n' + '\n\n'.join(blocks) + '\n'


if __name__ == '__main__':
    path = root/'README.md'
    if '--check' in sys.argv: sys.exit(path.read_text(encoding='utf-8') != readme())
    path.write_text(readme(), encoding='utf-8')
