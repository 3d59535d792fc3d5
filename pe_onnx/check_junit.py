"""A check as JUnit XML: a test suite for each bundle and provider, a test case for each finding.

The form is the one that Jenkins, GitLab, Azure and GitHub's actions read: testsuites, testsuite, properties, testcase
with failure, error or skipped. Times are in seconds.
"""

from __future__ import annotations

import platform
import re
from xml.etree import ElementTree

from pe_onnx.check_report import BundleCheck, CheckReport, Figure, Finding

_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, or advises against."""


def to_junit(report: CheckReport) -> str:
    """The XML document, a line break at its end."""
    root = ElementTree.Element("testsuites", name="pe-onnx check")
    suites = [_suite(check, report.started) for check in report.checks]
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in suites)))
    root.set("time", f"{report.seconds:.3f}")
    root.extend(suites)
    ElementTree.indent(root)
    document = ElementTree.tostring(root, "unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{document}\n'


def _suite(check: BundleCheck, started: str) -> ElementTree.Element:
    statuses = [finding.status for finding in check.findings]
    suite = ElementTree.Element(
        "testsuite",
        name=legal(check.label),
        tests=str(len(statuses)),
        failures=str(statuses.count("failed")),
        errors=str(statuses.count("error")),
        skipped=str(statuses.count("skipped")),
        time=f"{check.seconds:.3f}",
        timestamp=started.partition("+")[0],
        hostname=legal(platform.node() or "localhost"),
    )
    properties: dict[str, Figure] = {"encoding": check.encoding, "target": check.target, "dtype": check.dtype}
    for finding in check.findings:
        properties |= {f"{finding.part}.{finding.name}.{key}": value for key, value in finding.figures.items()}
    listed = ElementTree.SubElement(suite, "properties")
    for name, value in properties.items():
        if value is not None:
            ElementTree.SubElement(listed, "property", name=legal(name), value=legal(_text(value)))
    for finding in check.findings:
        suite.append(_case(check, finding))
    return suite


def _case(check: BundleCheck, finding: Finding) -> ElementTree.Element:
    case = ElementTree.Element(
        "testcase",
        classname=legal(f"pe-onnx.{check.label.replace('/', '.').strip('.')}"),
        name=legal(finding.title),
        time=f"{finding.seconds:.3f}",
    )
    message = legal(finding.message)
    if finding.bad:
        kind = "failure" if finding.status == "failed" else "error"
        result = ElementTree.SubElement(case, kind, message=message, type=f"pe_onnx.{finding.part}")
        step = f"next: {finding.next_step}" if finding.next_step else ""
        result.text = legal("\n".join(line for line in (finding.message, finding.details, step) if line))
    elif finding.status == "skipped":
        ElementTree.SubElement(case, "skipped", message=message)
    elif finding.message:
        said = (finding.message, finding.details)
        ElementTree.SubElement(case, "system-out").text = legal("\n".join(line for line in said if line))
    return case


def _text(value: Figure) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def legal(text: str) -> str:
    """The same with an escape such as ``\\x1b`` in place of each character that XML cannot hold."""
    return _FORBIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
