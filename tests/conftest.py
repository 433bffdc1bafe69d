"""What every test starts from: no network, one thread, fixed seeds."""

import os
import random
import sys
from pathlib import Path

# Before numpy, torch or transformers are imported: all three read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]

settings.register_profile("rootward", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("rootward")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seed every generator; torch only where a test has imported it, so that the others stay quick."""
    os.environ.pop("COLUMNS", None)  # tables are as wide as for a pipe, whoever runs the tests
    random.seed(0)
    np.random.seed(0)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def gpu_or_skip(request: pytest.FixtureRequest) -> None:
    """Skip a test marked `gpu`, by name, where there is no CUDA device."""
    if request.node.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"{request.node.nodeid} needs a CUDA device, found none")


@pytest.fixture
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder of small public data sets: `$ROOTWARD_DATA`, by default `../shared/data`."""
    path = Path(os.environ.get("ROOTWARD_DATA", "../shared/data"))
    path = path if path.is_absolute() else (REPOSITORY / path).resolve()
    if not path.is_dir():
        pytest.skip(f"{request.node.nodeid} needs the folder {path}; set ROOTWARD_DATA to where it is")
    return path
