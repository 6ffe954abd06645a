"""Builders and tables that several tests share: small models, cases, data sets in usual formats."""
