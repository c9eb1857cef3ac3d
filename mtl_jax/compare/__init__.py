"""The referee: trains one network with each of several weightings and shows what came of it."""
