"""The comparison as JUnit XML: the gates and regression cases of each artifact as test cases.

https://github.com/testmoapp/junitxml describes the format, as CI servers read it. A failed gate and
a broken case are failures, an inconclusive gate is an error, and a case that the baseline fails
too is skipped.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from quantkit.reports.cells import failures, gate_sentence
from quantkit.reports.text import writable
from quantkit.results.comparison import Comparison, Variant
from quantkit.results.regression import CaseOutcome
from quantkit.results.verdict import GateOutcome, Verdict


def comparison_junit(comparison: Comparison) -> str:
    """One test suite for each artifact, whose name is the class name of its tests."""
    root = ET.Element("testsuites", name=f"quantkit {comparison.suite or ''}".strip())
    for variant in comparison.variants:
        suite = ET.SubElement(root, "testsuite", name=writable(variant.name))
        for gate in variant.gates:
            _gate(suite, variant, gate)
        regression = variant.quality.regression if variant.quality else None
        for case in regression.cases if regression else ():
            _case(suite, variant, case)
    for element in (root, *root):
        element.set("tests", str(len(list(element.iter("testcase")))))
        for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            element.set(name, str(len(list(element.iter(tag)))))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _gate(suite: ET.Element, variant: Variant, gate: GateOutcome) -> None:
    bounds = [f">= {gate.min:g}"] if gate.min is not None else []
    bounds += [f"<= {gate.max:g}"] if gate.max is not None else []
    test = _test(suite, variant, f"gate {gate.metric} {' and '.join(bounds)}")
    if not gate.passed:
        tag = "error" if gate.verdict is Verdict.INCONCLUSIVE else "failure"
        ET.SubElement(test, tag, message=writable(gate_sentence(gate)), type=f"gate {gate.verdict}")


def _case(suite: ET.Element, variant: Variant, case: CaseOutcome) -> None:
    test = _test(suite, variant, f"case {case.id}")
    if case.passed:
        return
    if not case.baseline_passed:
        ET.SubElement(test, "skipped", message="the baseline fails it too")
        return
    mark = "critical case broken" if case.critical else "case broken"
    message = ": ".join(filter(None, (mark, failures(case))))
    failure = ET.SubElement(test, "failure", message=writable(message), type="regression")
    failure.text = writable(f"baseline: {case.baseline_answer}\nartifact: {case.answer}")


def _test(suite: ET.Element, variant: Variant, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=writable(variant.name), name=writable(name))
