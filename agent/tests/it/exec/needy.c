/* Needs a function of another library. */
int of_another(void);

int ask(void *read, long nr_read, void **write, long nr_write)
{
    (void)read, (void)nr_read, (void)nr_write;
    *(int *)write[0] = of_another();
    return 0;
}
