__version__ = "0.1.0"

import importlib.util
from pathlib import Path

import torch


def _declare_torchvision_operators():
    """Let torchvision be imported where its compiled operators do not fit the installed torch.

    The torchvision on PyPI is linked to CUDA. Beside a CPU-only torch its library does not load, and then its
    import, and timm's and open_clip's with it, dies with `operator torchvision::nms does not exist`. Declaring
    the two operators that the import asks for is enough: nothing here calls them. It must happen before anyone
    imports timm, hence in this file, the only one in the package that no notebook writes.
    """
    spec = importlib.util.find_spec('torchvision')
    if spec is None: return None
    try:
        for library in Path(spec.origin).parent.glob('_C*'): torch.ops.load_library(library)
    except OSError:
        operators = torch.library.Library('torchvision', 'FRAGMENT')
        for name in ('nms', 'qnms'): operators.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
        return operators


_torchvision_operators = _declare_torchvision_operators()  # kept alive: the operators vanish with the library
