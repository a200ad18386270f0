import shlex

import pytest

from microdit.io.untrusted_text import command_line


def test_a_line_can_be_typed_again():
    arguments = [
        "microdit",
        "train",
        "my recipe.yaml",
        "data.path=a b",
        "record.sample_prompts=[$(touch x)]",
        "--resume",
        "--caption-tokens",
        "77",
    ]
    assert shlex.split(command_line(arguments)) == arguments


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--judge-key", "sk-1", "x"], ["--judge-key", "***", "x"]),
        (["--api_key=sk-1"], ["--api_key=***"]),
        (["--token", "--odd-one", "--resume"], ["--token", "***", "--resume"]),
        (["record.wandb_key=sk-1"], ["record.wandb_key=***"]),
        (["+hub.HF_TOKEN=sk-1"], ["+hub.HF_TOKEN=***"]),
        (["--password", "sk-1"], ["--password", "***"]),
        (["client_secret=sk-1=="], ["client_secret=***"]),
        (["--pass", "sk-1"], ["--pass", "***"]),
        (["--keys=sk-1", "PASSWORD1=sk-1"], ["--keys=***", "PASSWORD1=***"]),
        (["--header", "Authorization: Bearer sk-1"], ["--header", "Authorization:***"]),
        (["--header=X-Api-Key : sk-1"], ["--header=X-Api-Key :***"]),
        (["https://me:sk-1@host/data.tar"], ["https://***@host/data.tar"]),
        (["https://me:sk-1@b@c/?d#e@host/x"], ["https://***@host/x"]),
        (["https://sk-1@host"], ["https://***@host"]),
        (["https://host/data.tar?X-Amz-Signature=sk-1&e=5"], ["https://host/data.tar?***"]),
        (["https://host/data.tar#access_token=sk-1"], ["https://host/data.tar?***"]),
        (["data.path=s3://me:sk-1@host/a", "--url=http://me:sk-1@h"], ["data.path=s3://***@host/a", "--url=http://***@h"]),
        (["https://[::1/x?sk-1"], ["https://[::1/x?***"]),
        (["https://host:8000/v1", "monkey", "a@b", "seed=1", "cuda:1"], ["https://host:8000/v1", "monkey", "a@b", "seed=1", "cuda:1"]),
    ],
)
def test_secrets_are_left_out_and_nothing_else(arguments, shown):
    line = command_line(["microdit", *arguments])
    assert shlex.split(line) == ["microdit", *shown]
    assert "sk-1" not in line
