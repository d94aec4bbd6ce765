"""Without torch the bridge says what it needs, and the rest works."""

import subprocess
import sys

CODE = """
import sys
sys.modules["torch"] = None
import esper_fn
try:
    import torch_bridge
except ImportError as error:
    print(error)
"""


def test_importing_the_bridge_names_the_remedy():
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == (
        "torch_bridge needs PyTorch 2.11 or newer, which is not installed: "
        "pip install 'esper-fn[torch]'"
    )
