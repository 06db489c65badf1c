"""Distil several vision foundation models into one student.

`radio_nb.distill`, `create`, `Run`, `Recipe`, `Student` and `load_teacher` are loaded when they are first used, so that
`import radio_nb` costs nothing. All else is imported from the part it lives in, as in
`from radio_nb.targets.phi_s import fit_normalizer`.
"""
__version__ = "0.1.0"

import importlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from radio_nb.front.run import Run as Run
    from radio_nb.front.run import distill as distill
    from radio_nb.models.student import Student as Student
    from radio_nb.models.student import create as create
    from radio_nb.models.teachers import load_teacher as load_teacher
    from radio_nb.training.recipe import Recipe as Recipe

_homes = {'distill': 'front.run', 'create': 'models.student', 'Run': 'front.run', 'Recipe': 'training.recipe',
          'Student': 'models.student', 'load_teacher': 'models.teachers'}
__all__ = list(_homes)


def __getattr__(name):
    if name not in _homes: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'radio_nb.{_homes[name]}'), name)


def __dir__(): return sorted([*globals(), *_homes])


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Lets torchvision be imported where its compiled operators do not fit the installed torch.

    The torchvision on PyPI is linked to CUDA. Beside a CPU-only torch its library does not load, and then its
    import, and timm's and open_clip's with it, dies with `operator torchvision::nms does not exist`. Declaring
    the two operators that the import asks for is enough: nothing here calls them. It must happen before anyone
    imports torchvision, hence in this file, which no notebook writes; and not earlier,
    since it needs torch, which takes seconds to load.
    """
    operators = None  # kept alive: the operators vanish with the library

    def find_spec(self, name, path, target=None):
        if name != 'torchvision': return None
        sys.meta_path.remove(self)
        self._declare()
        return None   # the ordinary finders go on

    def _declare(self):
        import torch
        spec = importlib.util.find_spec('torchvision')
        if spec is None: return
        try:
            for library in Path(spec.origin).parent.glob('_C*'): torch.ops.load_library(library)
        except OSError:
            library = torch.library.Library('torchvision', 'FRAGMENT')
            for name in ('nms', 'qnms'): library.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
            _BeforeTorchvision.operators = library


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Makes the networks of `radio_nb.models.eradio` known to timm, as soon as somebody imports timm.

    That chapter stands behind those that ask timm for a network, so none of them can import it. It must itself import
    nothing of this package that imports timm: whoever does so first is still being imported at that moment.
    """
    def find_spec(self, name, path, target=None):
        if name != 'timm': return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is None: return None
        execute = spec.loader.exec_module

        def and_register(module):
            execute(module)
            importlib.import_module('radio_nb.models.eradio')
        spec.loader.exec_module = and_register
        return spec


if 'torchvision' not in sys.modules: sys.meta_path.insert(0, _BeforeTorchvision())
if 'timm' in sys.modules: importlib.import_module('radio_nb.models.eradio')
else: sys.meta_path.insert(0, _AfterTimm())
