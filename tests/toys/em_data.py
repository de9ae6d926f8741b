"""The data of the emergent misalignment papers, and the mark of the tests that need them.

They are not part of the repository. HOLDFAST_EM_DATA names their folder, else they are looked for in shared/data/em;
XSTest lies beside that folder, in xstest/.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EM_DATA = Path(os.environ.get("HOLDFAST_EM_DATA") or ROOT / "shared" / "data" / "em")
EM_QUESTIONS = sorted((EM_DATA / "evaluation").glob("*.yaml"))
XSTEST = EM_DATA.parent / "xstest" / "xstest_prompts.csv"
needs_em_data = pytest.mark.skipif(not EM_DATA.is_dir(), reason=f"{EM_DATA} is absent: set HOLDFAST_EM_DATA")
needs_xstest = pytest.mark.skipif(not XSTEST.is_file(), reason=f"{XSTEST} is absent: set HOLDFAST_EM_DATA")
