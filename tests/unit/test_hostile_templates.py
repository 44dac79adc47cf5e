"""A chat template of a model folder runs in a sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_folder import build_folder
from zppo_mm.rollout.chat import ChatFormat

TEMPLATES = [
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}",
    "{{{{ lipsum.__globals__['os'].popen('touch {marker}').read() }}}}",
    "{{{{ raise_exception.__globals__['__builtins__']['open']('{marker}', 'w') }}}}",
    "{{{{ messages.__init__.__globals__ }}}}",
    "{{% set x = strftime_now.__globals__ %}}{{{{ x['__builtins__']['exec'](\"open('{marker}', "
    "'w')\") }}}}",
    "{{% include '/etc/passwd' %}}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_template_cannot_leave_its_sandbox(
    tmp_path: Path, marker: Path, template: str
) -> None:
    build_folder(tmp_path, vision=False)
    (tmp_path / "chat_template.jinja").write_text(template.format(marker=str(marker)))
    with pytest.raises(Exception, match=r"(?i)unsafe|undefined|no loader|security|access"):
        ChatFormat(tmp_path).render("a question", [])
