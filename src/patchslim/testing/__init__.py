"""Checks for methods and families of your own: the laws that every method and family here keeps.

`check_method(MyMethod())` and `check_adapter(my_model, MyFamily())` raise `BrokenLaw`, which names
the law and says what was observed.
"""

from patchslim.errors import BrokenLaw
from patchslim.testing.adapter_laws import FAMILY_LAWS, check_adapter
from patchslim.testing.method_laws import METHOD_LAWS, check_method

__all__ = ["FAMILY_LAWS", "METHOD_LAWS", "BrokenLaw", "check_adapter", "check_method"]
