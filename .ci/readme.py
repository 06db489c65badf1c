"""Make README.md from nbs/index.ipynb: `python .ci/readme.py`, or `--check` to see whether they agree."""
import json
import sys
from pathlib import Path

root = Path(__file__).parent.parent


def readme():
    "The markdown cells of the index, with the cells of code that are shown there."
    blocks = []
    for cell in json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': blocks.append(source)
        elif not source.startswith('#|'): blocks.append(f'```python\n{source}\n```')
    return '<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->\n\n' + '\n\n'.join(blocks) + '\n'


if __name__ == '__main__':
    path = root/'README.md'
    if '--check' in sys.argv: sys.exit(path.read_text(encoding='utf-8') != readme())
    path.write_text(readme(), encoding='utf-8')
