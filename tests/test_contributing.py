"CONTRIBUTING.md adds a teacher, a loss, a normalizer, a measure, a chapter and a listener: run as they stand."
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from nbdev.export import nb_export

TEXT = (ROOT/'CONTRIBUTING.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


def test_there_are_six_of_about_ten_lines():
    assert len(BLOCKS) == 6 and max(sum(map(bool, block.split('\n'))) for block in BLOCKS) <= 10


def run(folder, *blocks):
    "Blocks in one process of their own, which is told to use the CPU and few images a step."
    done = subprocess.run([sys.executable, '-c', '\n'.join(blocks)], capture_output=True, text=True, cwd=folder,
                          env=os.environ | {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr


def test_a_teacher_and_a_measure(tmp_path):
    teacher, _, _, measure, *_ = BLOCKS
    run(tmp_path, teacher, measure)
    assert 'share of positive features' in (tmp_path/'runs'/'run-1'/'report.html').read_text()


@pytest.mark.parametrize('block, method', [(1, 'phi-s-charbonnier'), (2, 'largest')])
def test_a_loss_and_a_normalizer(tmp_path, block, method):
    run(tmp_path, BLOCKS[block])
    assert f'method = "{method}"' in (tmp_path/'runs'/'run-1'/'recipe.toml').read_text()


def test_a_listener(tmp_path):
    run(tmp_path, BLOCKS[5])
    assert '"lengths": ' in (tmp_path/'runs'/'run-1'/'metrics.jsonl').read_text()


def test_a_chapter(tmp_path):
    (tmp_path/'nbs'/'targets').mkdir(parents=True)
    run(tmp_path, BLOCKS[4])
    nb_export(tmp_path/'nbs'/'targets'/'07_middle.ipynb', lib_path=tmp_path/'lib')
    assert 'def middle(y:Tensor)' in (tmp_path/'lib'/'targets'/'middle.py').read_text()
