"""What a run's weights depend on, as fingerprints: a checkpoint of other ones is another run's."""

import hashlib
import json

from manta.data.config_history import as_version_1
from manta.data.sampling import mixture, order, packing
from manta.data.shards.manifest import PreparedData
from manta.trainer.config.training import TrainingConfig


def identity_of(config: TrainingConfig, prepared: PreparedData) -> dict[str, str]:
    """Of the run of this config over this corpus."""
    digest = hashlib.sha256(json.dumps(as_version_1(config.identity()), sort_keys=True).encode()).hexdigest()[:16]
    identity = {"corpus": prepared.fingerprint, "config": digest, "order": str(order.VERSION)}
    if config.data.mixture:
        identity["mixture"] = str(mixture.VERSION)
    if config.data.packing == "best_fit":
        identity["packing"] = str(packing.VERSION)
    return identity
