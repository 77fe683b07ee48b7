"""A language model that lives on your own machine and learns every night from what you accepted or corrected.

>>> from edgecl import Learner
>>> learner = Learner.init("smollm2")  # doctest: +SKIP
>>> learner.observe(['{"prompt": "Who waters the plants?", "completion": "Mira, on Fridays."}'])  # doctest: +SKIP
>>> learner.adapt().accepted  # doctest: +SKIP
True
"""

from __future__ import annotations

from .data import Example
from .errors import EdgeclError
from .learner import Learner
from .night import AdaptReport
from .profile import Profile

__version__ = "0.1.0"
__all__ = ["AdaptReport", "EdgeclError", "Example", "Learner", "Profile", "__version__"]
