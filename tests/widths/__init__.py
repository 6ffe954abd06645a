"""Tests of widths: found, narrowed and solved anew."""
