"""A comparison as JUnit XML."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

from quantkit.reports.junit import comparison_junit
from quantkit.results.verdict import Verdict
from tests.helpers.present import present
from tests.helpers.sample_comparison import sample


def test_junit_has_every_gate_and_every_case() -> None:
    root = ET.fromstring(comparison_junit(sample()))
    names = [suite.get("name") for suite in root]
    assert names == ["awq-w4", "gptq-w4", "rtn-w4"]
    for suite in root:
        assert {test.get("classname") for test in suite} == {suite.get("name")}
        assert suite.get("tests") == str(2 + 20) == str(len(suite))
        assert suite.get("skipped") == "1"  # the one that the baseline fails
    failed = [test.get("name") for test in root[2] if test.find("failure") is not None]
    assert present(root[2].find("testcase[@name='case c0']/failure")).get("message") == (
        "critical case broken: number: holds no number"
    )
    assert failed == ["gate kl_divergence.mean <= 0.02", "case c0", "case c1"]
    assert (root.get("failures"), root.get("errors")) == ("3", "0")
    message = present(root[2].find("testcase/failure")).get("message")
    assert message == "kl_divergence.mean is 0.05, allowed at most 0.02"


def test_an_inconclusive_gate_is_an_error_to_junit() -> None:
    row = sample().variants[0]
    gates = tuple(replace(gate, verdict=Verdict.INCONCLUSIVE) for gate in row.gates)
    root = ET.fromstring(comparison_junit(replace(sample(), variants=(replace(row, gates=gates),))))
    assert (root.get("failures"), root.get("errors")) == ("0", "2")
