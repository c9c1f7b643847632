"""Look-up of targets next to modules of the user that have the names of Perdure's packages."""

import pytest

from trainer.config.targets import find


@pytest.mark.parametrize("file", ["models/cnn.py", "models/cnn/__init__.py", "trainer/task.py"])
def test_find_module_hidden_by_the_shipped_package_is_an_error(tmp_path, monkeypatch, file):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("class CNN: pass")
    monkeypatch.chdir(tmp_path)
    name = "models.cnn.CNN" if file.startswith("models") else "trainer.task.Classification"
    target, text = find(name)
    assert target is None
    assert f"hides {tmp_path / file}; rename the folder" in text


def test_find_shipped_model_next_to_other_modules_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert find("models.cnn.CNN")[1] == ""
    assert "rename the folder models" in find("models.mine.Net")[1]
