"""Feature-map distances and frozen models inside a loss, as programs of a page.

    python -m fusedloss.examples.content_loss [--quick] [--output FOLDER]

and so `style_transfer`, `blended`, `frozen_head` and `transfer_learning`. Each prints a table and
saves a picture; all inputs come with scikit-learn and scikit-image.
"""

from importlib import util

for _module, _name in {
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "matplotlib": "matplotlib",
}.items():
    if util.find_spec(_module) is None:
        raise ImportError(
            f"{_name} is not installed; get it with: python -m pip install 'fusedloss[examples]'"
        )
