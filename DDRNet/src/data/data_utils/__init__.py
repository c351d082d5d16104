"""Data and results on Huawei Cloud ModelArts."""
