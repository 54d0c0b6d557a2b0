/* Has what another library needs. */
int of_another(void)
{
    return 17;
}
