"""From recorded signals to features on the step grid. Each module is usable on its own, without Ray or a corpus."""
