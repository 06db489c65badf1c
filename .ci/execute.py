"""Run chapters and store their outputs: `python .ci/execute.py [nbs/03_normalizers.ipynb …]`, all without arguments.

Figures are stored twice, as plotly's own data for JupyterLab and as a small picture for pages that cannot run Python
(a PNG, or a JPEG where that would be large); the picture needs Chrome or Chromium on the machine. Cells flagged `slow`
or `cuda` keep the outputs they have, unless the flag is named: `--flags slow`.
"""
import argparse
import base64
import ctypes
import io
import os
import time
from contextlib import suppress
from pathlib import Path

os.environ.setdefault('PLOTLY_RENDERER', 'plotly_mimetype+png')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from PIL import Image


def keep_memory():
    "Let glibc keep what torch gives back: asking the system for it again takes time in every step on a CPU."
    with suppress(OSError, AttributeError):   # another C library
        libc, M_TRIM_THRESHOLD, M_MMAP_MAX = ctypes.CDLL('libc.so.6'), -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def flagged(cell, flags):
    "Whether `cell` opens with a directive that keeps it from running today."
    directives = [line[2:].strip() for line in cell.source.splitlines() if line.startswith('#|')]
    return any(d in ('slow', 'cuda', 'eval: false') and d not in flags for d in directives)


PLOTLY = 'application/vnd.plotly.v1+json'


def lighten(output, limit=60_000):
    """Store a picture with more than `limit` characters of PNG as JPEG, which costs photographs a fifth of it, and a
    figure made of pixels as a picture only: it gains nothing by plotly, and nbdev takes its `source` for a cell's."""
    data = output.get('data', {})
    data.pop('application/vnd.jupyter.widget-view+json', None)   # a widget lives as long as its kernel
    if any(trace.get('type') == 'image' for trace in data.get(PLOTLY, {}).get('data', [])): data.pop(PLOTLY)
    if len(data.get('image/png', '')) <= limit: return output
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(data.pop('image/png')))).convert('RGB').save(jpeg, 'JPEG', quality=80)
    data['image/jpeg'] = base64.b64encode(jpeg.getvalue()).decode()
    return output


def execute(path, flags):
    "Run the notebook at `path` in its own folder and write the outputs back."
    notebook, start, home = read_nb(path), time.time(), os.getcwd()
    shell = CaptureShell(path=path.parent)
    os.chdir(path.parent)
    try:
        for cell in notebook.cells:
            if cell.cell_type != 'code' or flagged(cell, flags): continue
            shell.cell(cell)
            # a shown figure also returns an output without data
            cell.outputs = [lighten(o) for o in cell.get('outputs', []) if o.get('data', True)]
            if shell.exc: raise SystemExit(f'{path}: the cell below failed\n{cell.source}\n{shell.prettytb(str(path))}')
    finally: os.chdir(home)
    write_nb(notebook, path)
    print(f'{path}: {time.time() - start:.0f} s')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--flags', nargs='*', default=[])
    args = parser.parse_args()
    keep_memory()
    for path in args.notebooks or sorted(Path('nbs').rglob('*.ipynb')): execute(path, args.flags)
