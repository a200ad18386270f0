from microdit.ranges import Range


def test_ends_belong_to_a_range_unless_it_says_otherwise():
    assert [Range(0, 1).holds(value) for value in (-0.1, 0, 1, 1.1, float("nan"))] == [False, True, True, False, False]
    assert [Range(0, 1, above=True, below=True).holds(value) for value in (0, 0.5, 1)] == [False, True, False]


def test_a_range_is_said_in_words():
    assert [str(Range(1, 10**6)), str(Range(0, 1, below=True)), str(Range(0.5, 2, above=True))] == [
        "from 1 to 1,000,000",
        "from 0 to less than 1",
        "from above 0.5 to 2",
    ]
