from tests.models.conftest import uncompiled

__all__ = ["uncompiled"]
