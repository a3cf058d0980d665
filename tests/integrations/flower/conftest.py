import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "app"))  # the app's own package, for what the simulator is to do
