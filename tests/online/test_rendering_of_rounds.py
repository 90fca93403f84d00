"""Online runs with settings of the chat template."""

from pathlib import Path

import yaml

from halos.models.tiny import TEMPLATE

from .test_rounds import StartedRun


def test_rounds_train_on_prompts_as_they_were_sampled(tmp_path: Path, cache: Path) -> None:
    """Else the policy would learn its answers after another prompt than it gave them to."""
    (template := tmp_path / "loud.jinja").write_text("{{ 'Shout: ' + tone + '\n' if tone is defined else '' }}" + TEMPLATE)
    settings = "data.chat_template_kwargs={tone: very loud}"
    started = StartedRun(tmp_path, cache, [f"model.chat_template={template}", "online.loss=dpo", settings])
    started.finish("online.rounds=1")
    training = started.run / "rounds" / "000" / "train"
    assert yaml.safe_load((training / "config.yaml").read_text())["data"]["chat_template_kwargs"] == {"tone": "very loud"}
    assert "Shout: very loud" in (training / "train.log").read_text()
    assert "very loud" in (started.run / "FINAL" / "chat_template.jinja").read_text()
