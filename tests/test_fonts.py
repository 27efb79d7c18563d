"""Captions of every script are drawn with a font that has it, where the machine has one."""

import subprocess

import pytest
from PIL import Image

from unlearn.report import fonts
from unlearn.report.figures import draw_influence


@pytest.fixture(autouse=True)
def forget():
    for function in fonts.list_fonts, fonts.open_font:
        function.cache_clear()


def test_latin_text_has_pillows_own_font_whatever_the_machine_has(monkeypatch):
    monkeypatch.setattr(fonts, "list_fonts", None)
    assert fonts.find_font("a green circle, 3 times", 15) is fonts.default_font(15)


@pytest.mark.parametrize("text", ["Жёлтая груша", "黄色い梨", "צהוב"])
def test_text_of_another_script_has_a_font_that_has_it(text):
    if not any(fonts.list_fonts(character) for character in text):
        pytest.skip("this machine has no font of this script")
    font = fonts.find_font(text, 15)
    assert not any(fonts.lacks(font, character) for character in text)


def test_without_fontconfig_or_a_font_boxes_are_drawn_and_nothing_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts.shutil, "which", lambda name: None)
    assert fonts.find_font("黄", 15) is fonts.default_font(15)
    monkeypatch.setattr(fonts, "list_fonts", lambda character: [str(tmp_path / "none.ttf")])
    assert fonts.find_font("黄", 15) is fonts.default_font(15)
    picture = Image.new("RGB", (8, 8))
    assert draw_influence(picture, "黄", [(picture, "груша", False)]).size[0] > 200


def test_the_name_of_a_font_is_asked_for_by_number_alone(monkeypatch):
    """A caption never reaches another program's command line."""
    asked = []
    result = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(fonts.subprocess, "run", lambda words, **_: asked.append(words) or result)
    monkeypatch.setattr(fonts.shutil, "which", lambda name: name)
    fonts.find_font("黄; rm -rf", 15)
    assert asked == [["fc-list", ":charset=9ec4", "file"]]
