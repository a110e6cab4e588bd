"""The pictures of the help pages: for each file below web/docs what draws it. `python dev.py pictures` makes them."""

from .drawings import DRAWINGS
from .screenshots import SCREENSHOTS

PICTURES = {**DRAWINGS, **SCREENSHOTS}
