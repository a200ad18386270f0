"""What a GPU-hour costs: a small table with its date and sources, for a first idea. Your own price always wins."""

from dataclasses import dataclass

from microdit.errors import UserError
from microdit.formats import finite


@dataclass(frozen=True)
class Price:
    """Dollars of one GPU for an hour, and where the figure is from."""

    dollars: float
    source: str


# Rented by the hour, without commitment. A third party's list of one provider's cheapest offers, read through a search index in November
# 2026, not on the provider's own page: deploybase.ai/articles/runpod-gpu-pricing, 10 March 2026. That page calls the column "spot";
# spheron.network/blog/runpod-h100-pricing-2026, 22 May 2026, has $2.69 for the H100 SXM as an ordinary price of the same provider.
LISTED = "RunPod's cheapest, as deploybase.ai listed it on 10 March 2026"
# No page was found for these: rough figures from memory, to be overridden.
ROUGH = "a rough figure without a source"

PRICES = {
    "B200": Price(5.98, LISTED),
    "H200 NVL": Price(3.40, ROUGH),
    "H200": Price(3.59, LISTED),
    "H100 NVL": Price(2.60, ROUGH),
    "H100 PCIe": Price(1.99, LISTED),
    "H100 SXM": Price(2.69, LISTED),
    "A100 80 GB": Price(1.39, LISTED),
    "A100 40 GB": Price(1.29, ROUGH),
    "L40S": Price(0.79, LISTED),
    "L40": Price(0.69, LISTED),
    "L4": Price(0.44, LISTED),
    "RTX 6000 Ada": Price(0.77, ROUGH),
    "RTX A6000": Price(0.49, ROUGH),
    "A40": Price(0.40, ROUGH),
    "A10G": Price(1.00, ROUGH),
    "A10": Price(0.75, ROUGH),
    "RTX 5090": Price(0.69, LISTED),
    "RTX 4090": Price(0.34, LISTED),
    "RTX 3090": Price(0.22, LISTED),
    "V100 32 GB": Price(0.70, ROUGH),
    "V100": Price(0.50, ROUGH),
    "T4": Price(0.50, ROUGH),
    "MI300X": Price(2.99, ROUGH),
}


def checked_price(dollars: object, where: str) -> float:
    """Raises UserError, which begins with `where`, for what is no price."""
    number = finite(dollars)
    if number is None or number < 0:
        raise UserError(f"{where} is {dollars}, and must be the dollars of a GPU-hour, 0 or more.")
    return number
