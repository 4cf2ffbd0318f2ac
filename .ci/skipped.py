"""Print the tests that a run of pytest skipped, one node id per line.

python .ci/skipped.py JUNIT_XML
"""

import sys
from xml.etree import ElementTree

for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    if case.find("skipped") is not None:
        # A module that skipped as a whole has no class name: its own name is the test's name.
        module, name = case.get("classname"), case.get("name")
        print(
            f"{module.replace('.', '/')}.py::{name}" if module else f"{name.replace('.', '/')}.py"
        )
