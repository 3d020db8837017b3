"""An extension of griffe: the section that the docstrings call Example is code and what it prints."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Gives the section the name under which griffe reads it; another one would be a text with quotations."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
