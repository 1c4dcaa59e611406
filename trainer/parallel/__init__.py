"""How weights are split over ranks, and the collectives that each kind of parallelism adds to a model."""
