"""The Ray that a run uses: private, over hosts, or joined."""
