"""What the server logs, and how often."""

import logging
import logging.config

from microdit.serve.connections import LOGGING, OncePerMinute


def record(text: str, seconds: float, *arguments: object, name: str = "uvicorn.error") -> logging.LogRecord:
    made = logging.LogRecord(name, logging.WARNING, __file__, 1, text, arguments, None)
    made.created = seconds
    return made


def test_a_kind_is_said_once_a_minute_with_how_often_it_was_not():
    once, said = OncePerMinute(), []
    for number in range(1000):
        line = record("connection %d\nat %s", 100 + 0.1 * number, number, "somewhere")
        if once.filter(line):
            said.append(line.getMessage())
    assert said == ["connection 0\nat somewhere", "connection 600\nat somewhere (and 599 times more since it was last said)"]
    assert once.filter(record("another kind", 130))
    assert once.filter(record("connection %d\nat %s", 130, 1, "somewhere", name="asyncio"))


def test_kinds_without_end_take_no_memory_without_end():
    once = OncePerMinute()
    for number in range(5000):
        once.filter(record(f"kind {number}", 1))
    assert len(once._seen) <= 1000


def test_all_loggers_of_a_server_go_through_it(capsys):
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio", "microdit.serve.server")]
    logging.config.dictConfig(LOGGING)
    try:
        for _ in range(100):
            for logger in loggers:
                logger.warning("%s is tired", "somebody")
        assert capsys.readouterr().err.count("somebody is tired") == len(loggers)
    finally:
        for name in LOGGING["loggers"]:
            logging.getLogger(name).handlers.clear()
