"""The teacher by the batch API: half the price, within a day."""
