"""Recorded robot data: LeRobot's data set folders and plain video files. Needs the extra ``theia[robots]``."""
