"""The documentation: `make docs` builds docs/_build, from these pages and the docstrings."""

import importlib.metadata
import importlib.resources
import re

from docutils import nodes
from latex2mathml import converter
from sphinx.util import logging

project = "mtl_jax"
author = copyright = "The mtl_jax authors"
version = release = importlib.metadata.version("mtl-jax")

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"mtl_jax {release}"
# The font of the mathematics, without which a system that has none shows indices on the line.
math_font = importlib.resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
html_static_path = ["_static", str(math_font)]
html_css_files = ["site.css"]
html_copy_source = False
html_math_renderer = "mathml"

autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
toc_object_entries = False
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
# What is returned is described by its call, not by a type before a colon.
napoleon_custom_sections = ["Returns", ("Attributes", "params_style")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Every reference must be found, except the types of other packages, whose pages are elsewhere; the
# protocols of functions and the method on vectors, which their classes describe; and parts of
# annotations that are no names.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"(collections|jax|jaxlib|jaxtyping|numpy|optax|os|pandas|rich)\..*"),
    ("py:class", r"mtl_jax\.(_base\.(\w+Fn|VectorMethod)|_metrics\.State|compare\.weightings\.T)"),
    ("py:class", r"ndarray|Array"),  # those of NumPy and JAX, as jaxtyping has them
    ("py:.*", r"|dict\[str|typing\.Literal\[.*"),
]


def _append_mathml(translator, node, display):
    tex = re.sub(r"\\[lr]Vert\b", r"\\|", node.astext())  # which would grow with its indices
    if r"\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{split}} {tex} \end{{split}}"
    mathml = converter.convert(tex, display=display)
    if "\\" in mathml:
        logging.getLogger(__name__).warning("TeX that has no MathML: %s", tex, location=node)
    translator.body.append(mathml)
    raise nodes.SkipNode


def setup(app):
    """Render mathematics when the pages are built: browsers need no script and no network."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(
            lambda translator, node: _append_mathml(translator, node, "inline"),
            None,
        ),
        block_renderers=(lambda translator, node: _append_mathml(translator, node, "block"), None),
    )
