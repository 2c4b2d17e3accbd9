"""Keras losses exchanged for ours: whole models at once, and names for `compile`."""

import warnings

import keras
import tensorflow as tf
from keras.src.losses import ALL_OBJECTS_DICT
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.trainers.compile_utils import CompileLoss
from keras.src.utils.naming import get_object_name, to_snake_case
from keras.src.utils.tracking import no_automatic_dependency_tracking

from fusedloss import losses

_OURS = tuple(getattr(losses, name) for name in losses.__all__)
# Keras's classes and functions that ours stand for: those of their names.
_COUNTERPARTS = [
    (getattr(keras.losses, name), ours)
    for ours in _OURS
    for name in (ours.__name__, to_snake_case(ours.__name__))
    if hasattr(keras.losses, name)
]


def _counterpart(theirs):
    """Ours of a class or function, or None. By identity: what users give may have no hash."""
    return next((ours for known, ours in _COUNTERPARTS if known is theirs), None)


class _NoEquivalentError(Exception):
    """The text names what has none."""


def fuse(x):
    """The fused equivalent of a Keras loss, of several, or of those of a compiled model.

    Name, reduction, dtype and all arguments are kept. What has no equivalent stays as it is, and
    one warning names it: functions and subclasses of one's own, losses that this package lacks,
    "crossentropy" and "ce", for which Keras chooses a loss by the shapes of the first batch, and
    arguments that the fused class does not take, such as a variable. Fused losses stay too. A model
    is changed between two calls of `fit`, not by a callback within one.

    Args:
      x: a `keras.losses.Loss`, its class, a loss function of Keras, a name that `compile` takes,
        None, a list, tuple or dict of these, nested or not; or a compiled `keras.Model`.
    Returns:
      What `compile` takes in place of `x`: a loss object for an object, a name or a function, a
      class for a class, lists and dicts of these for lists and dicts. For a model, the model
      itself, compiled with the fused losses: weights, optimizer, metrics, their state and all
      else that it was compiled with stay.
    Raises:
      ValueError: a model that is not compiled; a name that Keras does not know.
      TypeError: something that is no loss.

    ```python
    model = keras.models.load_model("model.keras")
    fusedloss.fuse(model).fit(images, labels)
    ```
    """
    left = []

    def fused(leaf):
        try:
            return _fused(leaf)
        except _NoEquivalentError as error:
            left.append(str(error))
            return leaf

    if not isinstance(x, keras.Model):
        result = keras.tree.map_structure(fused, x)
    elif not x.compiled:
        raise ValueError(
            f"The model {x.name!r} is not compiled and has no losses to fuse: compile it first, or "
            "give `compile` what `fuse` makes of a loss."
        )
    else:
        result = x
        if x._compile_loss is not None:
            _fuse_losses(x, fused)
    if left:
        warnings.warn(
            f"No fused equivalent; left as they are: {', '.join(dict.fromkeys(left))}.",
            stacklevel=2,
        )
    return result


def register():
    """Makes "fusedloss." before the name of a loss a name that `compile` and Keras know as a loss.

    That is each class of `fusedloss.losses` and each name that Keras has for its counterpart:
    "fusedloss.mse", "fusedloss.mean_squared_error" and "fusedloss.MeanSquaredError" are
    `fusedloss.losses.MeanSquaredError()`. Keras's own names keep their meaning: "mse" alone is
    Keras's. A second call changes nothing. A model that was compiled with such a name and saved
    needs this call before it is loaded.

    ```python
    fusedloss.register()
    model.compile("adam", loss="fusedloss.sparse_categorical_crossentropy")
    ```
    """
    names = {ours.__name__: ours for ours in _OURS}
    names |= {name: _counterpart(theirs) for name, theirs in ALL_OBJECTS_DICT.items()}
    ALL_OBJECTS_DICT.update({f"fusedloss.{name}": ours for name, ours in names.items() if ours})


def _fused(loss):
    """The equivalent of one loss; `_NoEquivalentError` if there is none."""
    if loss is None or isinstance(loss, _OURS):
        return loss
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):
        raise _NoEquivalentError(repr(loss))
    if isinstance(loss, type):
        if issubclass(loss, _OURS):
            return loss
        if _counterpart(loss) is None:
            raise _NoEquivalentError(loss.__name__)
        return _counterpart(loss)
    known = keras.losses.get(loss) if isinstance(loss, str) else loss
    if isinstance(known, _OURS):
        return loss  # A name that `register` has made known.
    if isinstance(known, keras.losses.Loss):
        return _of_object(known)
    if not callable(known) or isinstance(known, keras.layers.Layer | keras.metrics.Metric):
        raise TypeError(
            "`fuse` takes Keras losses, their names, lists or dicts of these, or a compiled model. "
            f"Got {loss!r}."
        )
    # As `compile` does: the name that was given, else that of the function.
    name = loss if isinstance(loss, str) else get_object_name(loss)
    return _of_object(LossFunctionWrapper(known, name=name))


def _of_object(loss):
    """The equivalent of a loss object, which may be a function that is wrapped in one."""
    is_wrapper = type(loss) is LossFunctionWrapper
    if not is_wrapper and _counterpart(type(loss)) is None:
        raise _NoEquivalentError(type(loss).__name__)  # A subclass may do anything.
    ours = _counterpart(loss.fn)
    if ours is None:
        raise _NoEquivalentError(getattr(loss.fn, "__name__", repr(loss.fn)))
    arguments = loss._fn_kwargs  # `get_config` lacks Huber's delta and others.
    for name, value in arguments.items():
        if isinstance(value, tf.Variable | keras.Variable):
            raise _NoEquivalentError(f"{loss.name} (`{name}` is a variable)")
    try:
        return ours(reduction=loss.reduction, name=loss.name, dtype=loss.dtype, **arguments)
    except (TypeError, ValueError) as error:
        raise _NoEquivalentError(f"{loss.name} ({error})") from error


@no_automatic_dependency_tracking
def _fuse_losses(model, fused):
    """Does with the losses what `compile` does, and keeps what `compile` would make anew.

    That is the state of metrics that were given as names, and a loss scale that it once declined.
    """
    compiled = model._compile_loss
    given = compiled._user_loss  # `model.loss` has TensorFlow's containers, not the user's.
    loss = keras.tree.map_structure(fused, given)
    pairs = zip(keras.tree.flatten(given), keras.tree.flatten(loss), strict=True)
    if all(before is after for before, after in pairs):
        return
    model._compile_loss = CompileLoss(
        loss, compiled._user_loss_weights, output_names=compiled.output_names
    )
    model._compile_config.config["loss"] = loss
    model.loss = loss
    model.train_function = model.test_function = None
