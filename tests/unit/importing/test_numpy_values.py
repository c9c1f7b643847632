"""NumPy values in weight files are read as numbers or inert records, for any pickled state."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

from trainer.config.schema import Init
from trainer.errors import CheckpointError, ConfigError
from trainer.importing import pickles, weights
from trainer.importing.numpy_values import NumPyRecord
from trainer.importing.pickles import UnsafePickleError

NUMBERS = st.one_of(
    npst.boolean_dtypes(), npst.integer_dtypes(endianness="?"), npst.floating_dtypes(
        endianness="?"), npst.complex_number_dtypes(endianness="?", sizes=(64, 128))
)  # fmt: skip
SCALARS = NUMBERS.flatmap(lambda dtype: npst.arrays(dtype, 1)).map(lambda array: array[0])
ARRAYS = npst.arrays(npst.scalar_dtypes(), npst.array_shapes(min_dims=0, min_side=0))


def saved_and_read(value):
    file = io.BytesIO()
    torch.save({"weight": torch.ones(2), "value": value}, file)
    file.seek(0)
    return pickles.load(file, "a")


@given(value=SCALARS)
def test_numbers_are_read_as_python_numbers(value):
    read = saved_and_read(value)
    assert torch.equal(read["weight"], torch.ones(2))
    if value.dtype.itemsize > 16 or value.dtype == np.longdouble:
        assert isinstance(read["value"], NumPyRecord)
    else:
        assert type(read["value"]) is type(value.item())
        assert np.array_equal(read["value"], value.item(), equal_nan=True)


@given(value=st.one_of(ARRAYS, st.just(np.array([{}, None], dtype=object))))
def test_arrays_are_inert_records(value):
    assert isinstance(saved_and_read([value])["value"][0], NumPyRecord)
    assert isinstance(saved_and_read(np.random.get_state())["value"][1], NumPyRecord)


class Forged:
    """Pickles as any call of one of NumPy's functions, with any state."""

    def __init__(self, function, arguments, state):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


SCALAR, RECONSTRUCT = np.float64(1).__reduce__()[0], np.ones(1).__reduce__()[0]
ANY = st.recursive(
    st.none() | st.integers() | st.text(max_size=3) | st.binary(max_size=9),
    lambda values: st.lists(values, max_size=4).map(tuple),
)


@given(
    function=st.sampled_from([SCALAR, RECONSTRUCT, np.dtype, np.ndarray]),
    arguments=st.lists(ANY, max_size=4).map(tuple),
    state=ANY.filter(bool),
)
def test_forged_state_reaches_no_numpy_function(function, arguments, state):
    try:
        read = saved_and_read(Forged(function, arguments, state))
    except CheckpointError:
        return  # torch's unpickler does not set this state
    assert isinstance(read["value"], NumPyRecord)


def test_other_functions_of_numpy_are_rejected():
    with pytest.raises(UnsafePickleError, match="numpy"):
        saved_and_read(Forged(np.load, ("a",), None))
    assert pickle.loads(pickle.dumps(np.float32(2))) == 2  # NumPy itself is unchanged


def test_weights_with_numpy_values_are_loaded(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    values = {"epoch": np.int64(3), "best": np.float32(0.5), "history": np.arange(3.0)}
    torch.save({"model": source.state_dict(), **values}, tmp_path / "a.pt")
    weights.load(target, Init(weights=str(tmp_path / "a.pt")))
    assert torch.equal(source.weight, target.weight)
    torch.save({name: value.numpy() for name, value in source.state_dict().items()},
               tmp_path / "b.pt")  # fmt: skip
    with pytest.raises((CheckpointError, ConfigError)):
        weights.load(target, Init(weights=str(tmp_path / "b.pt")))
