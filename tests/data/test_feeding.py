"""Images that other processes make ready are those that are made in this one, and their errors are sentences."""

import ctypes
import multiprocessing
import os
import signal
from contextlib import closing

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from kdnas.cli.commands import main
from kdnas.data import feeding
from kdnas.data.base import Data, Images, TensorImages
from kdnas.data.feeding import Feed, Steps, decoding, num_decoders
from kdnas.data.files import FileImages
from kdnas.distillers.base import ObjectiveDistiller
from kdnas.network import Network
from kdnas.randomness import initialised
from kdnas.settings import Recipe
from kdnas.training.loop import Training
from tests.distillers.spaces import TOY

LABELS = torch.arange(24) % 3
PLAIN = TensorImages(torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), LABELS)
CPU = torch.device("cpu")


def data(train=PLAIN):
    return Data(train, PLAIN, PLAIN, class_names=("a", "b", "c"), augmentation="strong_crop_flip")


class Acting(Images):
    """Images whose reading does something first."""

    is_decoded = True

    def __init__(self, act):
        self.labels, self.act, self.is_on = LABELS, act, False

    def take(self, indices):
        if self.is_on:
            self.act()
        return PLAIN.take(indices)


def acting(act):
    """Steps of data that have been checked, and do something from then on."""
    steps = Steps(data(Acting(act)), 0, 8)
    steps.data.train.is_on = True
    return steps


@pytest.mark.parametrize(("views", "rows"), [(2, slice(None)), (0, slice(2, 6))])
def test_images_are_the_same_for_any_number_of_processes_and_from_any_step(views, rows):
    steps = Steps(data(), 3, 8, views, rows)
    here = [steps.pixels(step) for step in range(5)]
    for decoders in (1, 2):
        with closing(Feed(steps, 5, decoders)) as feed:
            for step in (0, 1, 2, 1, 4):  # a training that goes back, and one that leaves out a step
                assert torch.equal(feed(step), here[step])


def test_no_generator_and_no_handler_of_this_process_moves():
    before, handler = torch.get_rng_state(), signal.getsignal(signal.SIGCHLD)
    with closing(Feed(Steps(data(), 0, 8), 3, 1)) as feed:
        feed(0)
        assert torch.equal(torch.get_rng_state(), before) and signal.getsignal(signal.SIGCHLD) == handler


class Dropping(ObjectiveDistiller):
    """Labels, and dropout on the images."""

    model_type = Network

    def __init__(self):
        super().__init__((), label_smoothing=0.0)
        self.drop = nn.Dropout(0.5)

    def losses(self, model, batch, step):
        yield from self.student_losses("", model(self.drop(batch.images)), model, batch, step)


def training(decoders, folder):
    for number in range(24):
        Image.new("L", (8, 8), 10 * number).save(folder / f"{number}.png")
    files = FileImages([folder / f"{number}.png" for number in range(24)], LABELS, 8)
    whole = Data(files, files, files, class_names=("a", "b", "c"), augmentation="crop_flip")
    with decoding(decoders):
        model = initialised(lambda: Network(TOY.blueprint(TOY.largest)), 0)
        return Training(model, Dropping(), whole, None, Recipe(steps=6, batch_size=8))


def steps_of(training, count):
    with closing(training):
        for _ in range(count):
            training.step()
    return training.state()


def test_a_training_is_the_same_bit_for_bit_for_any_number_and_after_a_resumption(tmp_path):
    whole = steps_of(training(0, tmp_path), 6)
    resumed = training(1, tmp_path)
    resumed.load(steps_of(training(2, tmp_path), 3))
    for state in (steps_of(training(2, tmp_path), 6), steps_of(resumed, 3)):
        assert state["index"] == 6
        assert all(torch.equal(state["model"][name], tensor) for name, tensor in whole["model"].items())


def test_a_damaged_or_lost_file_is_named(tmp_path):
    made = training(1, tmp_path)
    (tmp_path / "5.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"5\.png cannot be read: it is in no known image format\.$"):
        steps_of(made, 3)
    (tmp_path / "5.png").unlink()
    with pytest.raises(ValueError, match=r"5\.png cannot be read: it leads nowhere\.$"):
        steps_of(made, 3)


class Refusal(ValueError):
    """An error of other people's data."""

    def __init__(self, number, reason):
        super().__init__(f"image {number}: {reason}")


def refuse():
    raise Refusal(7, "it is lost")


def fall():
    raise PermissionError(13, "Permission denied", "here.h5")


@pytest.mark.parametrize(("act", "kind", "text"), [(refuse, ValueError, "image 7: it is lost"), (fall, OSError, "h5")])
def test_an_error_of_other_people_s_data_is_theirs(act, kind, text):
    with closing(Feed(acting(act), 3, 1)) as feed, pytest.raises(kind, match=text):
        feed(0)


def test_a_process_that_is_killed_is_a_sentence(monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))  # not 5 s
    feed = Feed(acting(lambda: os.kill(os.getpid(), signal.SIGKILL)), 3, 1)
    with pytest.raises(ValueError, match=r"a process that decodes the images of step 0 was killed, .*--decoders"):
        feed(0)


def death_signal():
    number = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(number))  # PR_GET_PDEATHSIG
    raise ValueError(f"{number.value} {signal.getsignal(signal.SIGINT)!r} {signal.getsignal(signal.SIGTERM)!r}")


def test_it_ends_with_the_process_that_started_it_and_leaves_ctrl_c_to_that():
    expected = f"{signal.SIGKILL.value} {signal.SIG_IGN!r} {signal.SIG_DFL!r}"
    with closing(Feed(acting(death_signal), 3, 1)) as feed, pytest.raises(ValueError, match=expected.replace("|", ".")):
        feed(0)


def test_data_that_cannot_be_sent_are_refused_where_processes_do_not_share_memory(monkeypatch):
    monkeypatch.setattr(feeding, "_START", "spawn")
    with pytest.raises(ValueError, match=r"the data cannot be sent to the processes that decode: .*--decoders 0"):
        Feed(acting(lambda: None), 3, 1)(0)


def test_the_number_is_that_of_idle_cores_where_images_are_decoded(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {})

    def number(cores, threads, device=CPU, beside=1, **options):
        monkeypatch.setattr(feeding, "cores", lambda: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        with decoding(None, beside):
            return num_decoders(device, **options)

    assert number(8, 2) == 6 and number(8, 8) == number(8, 9) == 0 and number(8, 1, decodes=False) == 0
    assert number(8, 1, beside=4) == 1 and number(8, 8, torch.device("cuda"), beside=2) == 3
    assert number(64, 1) == 8
    with decoding(5):
        assert number(8, 8, decodes=False) == 5
    monkeypatch.setattr(feeding, "neighbours", lambda: 2)
    assert number(8, 1) == 3
    monkeypatch.setattr(multiprocessing.current_process(), "_config", {"daemon": True})
    assert number(8, 1) == 0
    with decoding(1), pytest.raises(ValueError, match=r"`decoders` must be 0 in a daemon of multiprocessing"):
        number(8, 1)


def test_a_command_s_result_does_not_depend_on_it(tmp_path, monkeypatch):
    begun = []
    start = Feed._begun
    monkeypatch.setattr(Feed, "_begun", lambda feed, step: (begun.append(feed.decoders), start(feed, step))[1])
    options = ["--data", "tests.toy:data", "--width", "4", "--steps", "2", "--batch-size", "8"]
    for number in ("0", "1"):
        main(["fit", *options, "--decoders", number, "--out", str(tmp_path / number)])
    assert begun == [1]
    weights = [next((tmp_path / number).rglob("weights.safetensors")).read_bytes() for number in ("0", "1")]
    assert weights[0] == weights[1]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--decoders", "-1", "--out", str(tmp_path / "no")])
