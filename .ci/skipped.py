"""The tests that skipped in a run of pytest, one node id a line: python skipped.py JUNIT_XML"""

import sys
from xml.etree import ElementTree

for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    if case.find("skipped") is not None:
        module, name = case.get("classname"), case.get("name")
        print(f"{module.replace('.', '/')}.py::{name}" if module else f"{name.replace('.', '/')}.py")
