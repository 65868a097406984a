"""YOLOS closed-set detector of COCO's classes. See README.md beside this file."""
