"""What more than one stage of DASC needs; the stages themselves are the scripts beside this folder."""
