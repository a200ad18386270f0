"""The server's log lines, and how often each kind is written."""

import logging
import logging.config

from microdit.serve.connections import LOGGING, OncePerMinute


def record(text: str, seconds: float, *arguments: object, name: str = "uvicorn.error") -> logging.LogRecord:
    made = logging.LogRecord(name, logging.WARNING, __file__, 1, text, arguments, None)
    made.created = seconds
    return made


def test_a_kind_is_logged_once_a_minute_with_the_number_suppressed():
    once, logged = OncePerMinute(), []
    for number in range(1000):
        line = record("connection %d\nat %s", 100 + 0.1 * number, number, "somewhere")
        if once.filter(line):
            logged.append(line.getMessage())
    assert logged == ["connection 0\nat somewhere", "connection 600\nat somewhere (and 599 more times since the last such line)"]
    assert once.filter(record("another kind", 130))
    assert once.filter(record("connection %d\nat %s", 130, 1, "somewhere", name="asyncio"))


def test_endlessly_many_kinds_take_bounded_memory():
    once = OncePerMinute()
    for number in range(5000):
        once.filter(record(f"kind {number}", 1))
    assert len(once._seen) <= 1000


def test_all_loggers_of_a_server_are_filtered(capsys):
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio", "microdit.serve.server")]
    logging.config.dictConfig(LOGGING)
    try:
        for _ in range(100):
            for logger in loggers:
                logger.warning("%s is slow", "somebody")
        assert capsys.readouterr().err.count("somebody is slow") == len(loggers)
    finally:
        for name in LOGGING["loggers"]:
            logging.getLogger(name).handlers.clear()
