"""Importing mlx_lm and transformers leaves the process as it was."""

import subprocess
import sys

from mlx_trainer.models.libraries import raised

PROGRAM = """
import os, resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3000, hard))
os.environ.pop("TRANSFORMERS_NO_ADVISORY_WARNINGS", None)
limits, setter = resource.getrlimit(resource.RLIMIT_NOFILE), resource.setrlimit
from mlx_trainer.models.libraries import quiet_imports
with quiet_imports():
    import mlx_lm
    import transformers
assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits, resource.getrlimit(resource.RLIMIT_NOFILE)
assert resource.setrlimit is setter
assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
"""


def test_imports_change_no_limit_and_print_nothing() -> None:
    """Both limits of open files and the environment are what they were, and neither library prints its advice."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_limit_is_raised_as_far_as_it_goes_and_never_lowered() -> None:
    """The soft limit grows to what is wanted within the hard one; a larger or unlimited one stays."""
    assert raised((256, 100_000), 2048, -1) == (2048, 100_000)
    assert raised((256, 1024), 2048, -1) == (1024, 1024)
    assert raised((256, -1), 2048, -1) == (2048, -1)
    assert raised((4096, 8192), 2048, -1) == (4096, 8192)
    assert raised((-1, -1), 2048, -1) == (-1, -1)


def test_importing_the_room_imports_neither_library() -> None:
    """mlx_lm, transformers and huggingface_hub are loaded where they are used, not by `import mlx_trainer.models`."""
    program = (
        "import sys, mlx_trainer.models\n"
        "print(sorted({'mlx_lm', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")
