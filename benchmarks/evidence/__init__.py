"""What helps a small encoder for robots: sweeps over teachers and ingredients, scored on the same recordings."""
