import pytest

from kdnas.runs.steps import StudentSteps, draft_of, forget_drafts

SETTINGS = {"steps": 4, "teacher": None}


def writer(calls):
    def train(folder):
        folder.mkdir()
        calls.append(folder.name)

    return train


def test_a_student_is_trained_once(tmp_path):
    calls = []
    for _ in range(2):
        steps = StudentSteps(tmp_path / "steps", SETTINGS)
        assert steps.student("a", writer(calls)) == tmp_path / "steps" / "a"
    steps.student("b", writer(calls))
    assert calls == ["a", "b"]


def test_one_whose_training_failed_is_trained_again(tmp_path):
    steps, calls = StudentSteps(tmp_path, SETTINGS), []

    def fail(folder):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        steps.student("a", fail)
    steps.student("a", writer(calls))
    assert calls == ["a"]


def test_one_that_a_kill_left_aside_while_it_was_replaced_counts(tmp_path):
    steps, calls = StudentSteps(tmp_path, SETTINGS), []
    (tmp_path / ".a.old").mkdir()
    steps.student("a", writer(calls))
    assert calls == []


def test_a_folder_begun_with_other_settings_is_refused_before_anything_is_trained(tmp_path):
    StudentSteps(tmp_path / "steps", SETTINGS).student("a", writer([]))
    StudentSteps(tmp_path / "steps", dict(reversed(SETTINGS.items())))
    with pytest.raises(ValueError, match="trained with other settings, data or teachers"):
        StudentSteps(tmp_path / "steps", SETTINGS | {"steps": 5})
    StudentSteps(tmp_path / "in a run")
    assert list((tmp_path / "in a run").iterdir()) == []


def test_a_folder_that_was_moved_with_its_teacher_goes_on_and_with_other_weights_it_does_not(tmp_path):
    def begin(place):
        StudentSteps(place / "steps", {"teacher": {"path": f"checkpoint:{place}/teacher"}, "data": f"{place}/images"})

    (tmp_path / "before" / "teacher").mkdir(parents=True)
    (tmp_path / "before" / "teacher" / "weights.safetensors").write_bytes(b"1")
    begin(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    begin(tmp_path / "after")
    (tmp_path / "after" / "teacher" / "weights.safetensors").write_bytes(b"2")
    with pytest.raises(ValueError, match="other settings, data or teachers"):
        begin(tmp_path / "after")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_a_kill_left_of_a_finished_student_is_removed_and_its_neighbours_is_not(tmp_path, elsewhere):
    steps = StudentSteps(tmp_path / "steps", None, tmp_path if elsewhere else None)
    steps.student("a", writer([]))
    checkpoint, draft = steps.checkpoint("a"), draft_of(steps.folder / "a", SETTINGS)
    assert checkpoint.parent == (tmp_path if elsewhere else steps.folder)
    own = [
        checkpoint,
        checkpoint.with_name(f".{checkpoint.name}.7.draft"),
        draft,
        draft.with_name(f".{draft.name}.7.draft"),
    ]
    other = [steps.checkpoint("ab"), draft_of(steps.folder / "a.b", SETTINGS)]
    for path in (*own, *other):
        path.write_text("")
    steps.student("a", writer([]))
    assert not any(path.exists() for path in own) and all(path.exists() for path in other)


def test_drafts_are_named_for_the_student_and_its_settings(tmp_path):
    names = {draft_of(tmp_path / n, s).name for n in ("a", "b") for s in (SETTINGS, SETTINGS | {"steps": 5})}
    assert len(names) == 4
    for name in names:
        (tmp_path / name).write_text("")
    forget_drafts(tmp_path / "a")
    assert [path.name[:3] for path in tmp_path.iterdir()] == [".b.", ".b."]


def test_decisions_are_read_as_they_were_written(tmp_path):
    StudentSteps(tmp_path, SETTINGS).write("anchors.json", [0, 2])
    steps = StudentSteps(tmp_path, SETTINGS)
    assert steps.read("anchors.json", [0]) == [0, 2] and steps.read("choice.json", None) is None
