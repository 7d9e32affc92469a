"""SIGTERM is taken as Ctrl-C is: at once, between steps, and by the command."""

import os
import signal
import threading

import pytest

from vitrim.cli.app import run
from vitrim.output.stage import staged_output
from vitrim.recover.schedule import stop_on_interrupt
from vitrim.stopping import stoppable


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("of_sigint", [signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL])
def test_it_interrupts_also_where_ctrl_c_is_ignored(of_sigint, tmp_path):
    before = signal.signal(signal.SIGINT, of_sigint)
    try:
        with pytest.raises(KeyboardInterrupt), stoppable(), staged_output(tmp_path / "out"):
            terminate()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_between_steps_the_first_is_noted_and_the_second_interrupts():
    with stoppable(), stoppable(), stop_on_interrupt() as stop:
        terminate()
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            terminate()


def test_a_program_that_handles_it_keeps_its_handler_and_other_threads_do_nothing():
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with stoppable():
            terminate()
        assert seen == [1]
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    found = []

    @stoppable()
    def job():
        found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def test_a_forked_process_ends_as_it_would_have():
    with stoppable():
        child = os.fork()
        if child == 0:
            terminate()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_the_command_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("vitrim.compression.pipeline.compress", lambda *_, **__: terminate())
    assert run(["compress", "local-dir:x", "--out", str(tmp_path / "out")]) == 130
    assert "--resume" in capsys.readouterr().err
