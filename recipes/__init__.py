"""The recipes as modules, loaded when they are first used: sslvit.recipes.mae is `recipes/mae.py`.

>>> import sslvit
>>> options = {"data": "shapes:n=64", "image_size": 16, "model": "mu/8", "epochs": 1, "warmup_epochs": 0}
>>> config = sslvit.recipes.mpp.Config(out="runs/mpp", **options)
>>> evaluations = sslvit.recipes.mpp.main(config)  # doctest: +ELLIPSIS
shapes (64 labelled by shape)...
>>> [line["step"] for line in evaluations]
[0, 1]
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

__all__ = [module.name for module in iter_modules(__path__) if not module.ispkg]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(f"there is no recipe {name!r}: there are {', '.join(__all__)}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
