"""Numbers as people read them: three significant digits or more, and a unit."""


def figure(value: float) -> str:
    """Return a number with at least three significant digits, thousands set apart.

    >>> [figure(value) for value in (12_345.6, 123.45, 12.345, 1.2345, 0.01234, 0)]
    ['12,346', '123', '12.3', '1.23', '0.012', '0']
    """
    if abs(value) < 1:
        return f"{value:.2g}"
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def scaled(value: float, unit: str = "") -> str:
    """Return a number with the prefix that suits it.

    >>> scaled(594.2e12, "FLOP/s"), scaled(1_260_000), scaled(512)
    ('594 TFLOP/s', '1.26 M', '512')
    """
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{figure(value / size)} {prefix}{unit}"
    return f"{figure(value)} {unit}".strip()


def memory(gb: float) -> str:
    """Return an amount of memory, in MB below 1 GB.

    >>> memory(58.21), memory(0.0761)
    ('58.2 GB', '76.1 MB')
    """
    return f"{figure(gb)} GB" if gb >= 1 else f"{figure(1000 * gb)} MB"


def duration(seconds: float) -> str:
    """Return a time; from two minutes on as hours, minutes and seconds.

    >>> duration(4.21), duration(150), duration(3725)
    ('4.21 s', '2:30', '1:02:05')
    """
    if seconds < 120:
        return f"{figure(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
