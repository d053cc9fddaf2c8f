"""The page of runs as an output of a notebook."""

import html


class Page:
    """A report's page; a notebook shows it in a frame of its own, in which nothing can touch the notebook.

    Args:
      text: the page, HTML.
      height: of the frame in pixels.
    """

    def __init__(self, text: str, *, height: int):
        self.text, self._height = text, height

    def _repr_html_(self) -> str:
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(self.text)}" width="100%" height="{self._height}" '
            'style="border: 0" title="Training stability"></iframe>'
        )
